"""All that trains and compares: data, tasks, methods, `lrlora train`, the demo, and `compare/`."""
