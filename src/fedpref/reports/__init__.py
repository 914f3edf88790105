"""What people look at, made from run directories."""
