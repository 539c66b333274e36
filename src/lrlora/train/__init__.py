"""`lrlora train` (settings, data, chats, tasks, methods, the run), and inference with a finished run."""
