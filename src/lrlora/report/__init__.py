"""What a person looks at: runs as data, and from them tables, pictures, pages and model cards."""
