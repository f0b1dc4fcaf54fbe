"""Files of models and adapters, and the PyTorch and PEFT models loaded from them."""
