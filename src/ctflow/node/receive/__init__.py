"""How series arrive: the C-STORE SCP, what a peer may send, when a series is complete."""
