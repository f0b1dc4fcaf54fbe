"""Per-token gates of LoRA rank channels."""
