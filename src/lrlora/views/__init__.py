"""What is shown of runs and adapters: tables, figures, and the page."""
