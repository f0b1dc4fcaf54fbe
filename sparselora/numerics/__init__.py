"""Scores, reconstruction errors, spectra and statistics on plain arrays: numpy and scipy only."""
