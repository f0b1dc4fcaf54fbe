"""Figures and Markdown tables: the style, and one module of figures per capability."""
