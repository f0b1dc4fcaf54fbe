"""Runs on disk and in processes: requests, folders, records, tables, workers, grids."""
