"""Several cases at a time: processes read the next ones and write the last ones while this one segments."""
