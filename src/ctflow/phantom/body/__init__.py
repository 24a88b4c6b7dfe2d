"""The chest: tissues, organs, bones, vessels, tumours."""
