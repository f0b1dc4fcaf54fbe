"""Phase B: what is measured on one layer's weight, and the tables over layers."""
