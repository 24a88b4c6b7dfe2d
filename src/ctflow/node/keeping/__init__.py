"""What stays on the disk, and for how long: retention, backups, and who may change the data folder."""
