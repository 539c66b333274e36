"""What a person looks at: the rank table in a terminal and the pictures."""
