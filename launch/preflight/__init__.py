"""What keeps a job from being worth anything, found before it is started."""
