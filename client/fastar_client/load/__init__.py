"""`fastar-load`: how many streams a server carries, and what their viewers see. Open loop: nobody waits for the server
before arriving, and what comes late is counted from when it was due."""
