"""What a cohort came to: its tables and its page, made of commit markers alone."""
