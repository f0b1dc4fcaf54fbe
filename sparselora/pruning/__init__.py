"""Phase C: one run that prunes rank channels, and its output files."""
