"""Rows of text or instructions, read from files or a hub, as token ids and batches."""
