"""`lrlora train` (settings, data, chats, tasks, methods, runs) and inference with finished runs."""
