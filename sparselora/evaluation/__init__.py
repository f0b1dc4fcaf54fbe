"""Held-out losses, accuracy, generation and GSM8K exact match."""
