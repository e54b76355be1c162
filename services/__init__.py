"""The processes of the mesh. Services talk by bus only: none imports another."""
