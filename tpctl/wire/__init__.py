"""What the front and the workers say to each other: settings, requests, messages. Standard library only."""
