"""What pages for a browser share: their frame, their style sheet, and how templates are filled."""
