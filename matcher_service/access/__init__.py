"""Who may do what: authentication, scopes, and the conduct of a credential."""
