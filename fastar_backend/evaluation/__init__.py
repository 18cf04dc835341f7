"""`fastar eval`: how fast, how much memory, how good. Every policy gets the same prompts, actions and noise; what was
measured is kept unit by unit, and the report is made from the units alone."""
