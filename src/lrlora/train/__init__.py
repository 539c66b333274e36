"""`lrlora train`, and what asks a finished run: settings, data, chats, tasks, methods, and the run itself."""
