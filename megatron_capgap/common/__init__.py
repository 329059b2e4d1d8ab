"""What every room may use: errors of users, and files that appear whole or not at all."""
