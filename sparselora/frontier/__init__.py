"""The command `frontier`: which shortcut of the training step pays on this model and data.

The search times candidates and trains pilots of them; `verdict` compares each with dense training for the same wall
clock and says what to train with.
"""
