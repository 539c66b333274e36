"""Views of runs and adapters: tables, figures, and the page."""
