"""What people read: tables, drawings, explanations, pass pages."""
