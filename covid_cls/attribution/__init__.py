"""What a network looks at, in maps and in numbers."""
