"""Many runs as data: arms × grid × seeds, trained, exported and evaluated by one command, with one table out."""
