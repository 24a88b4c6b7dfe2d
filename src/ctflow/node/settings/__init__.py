"""A site's settings for its node: from one YAML file, or none, to `service.ServiceSettings`."""
