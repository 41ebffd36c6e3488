"""Reports: pictures and tables that show what runs have learned."""
