"""The page that raters answer on, and the application that serves it."""
