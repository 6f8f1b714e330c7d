"""fastrm's loss inside the trainers of other libraries; each module needs the library it names."""
