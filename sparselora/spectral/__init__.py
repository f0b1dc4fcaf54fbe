"""The spectrum of a finished adapter: take ΔW = scaling · B A apart, edit its singular values, write it back."""
