"""The page that shows the node's work: server-rendered, without scripts, from this machine alone."""
