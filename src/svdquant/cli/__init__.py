"""The command `svdquant`: one file per verb."""
