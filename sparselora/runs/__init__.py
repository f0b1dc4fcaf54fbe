"""What a run leaves on disk, and how runs are started: folders and records, tables, workers, grids."""
