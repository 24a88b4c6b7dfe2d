"""The page that shows what the node does: server-rendered, without scripts, from this machine alone."""
