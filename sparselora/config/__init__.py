"""Settings of a run: strict fields, YAML, and the flags made from them."""
