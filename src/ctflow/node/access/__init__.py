"""Who may look, act and send over HTTP: users, sessions, attempts, and the sign-on that a site chose."""
