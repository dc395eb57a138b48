-- Notes on the C functions that no table describes: path -> { signature, text, example }. Paths are those of moe.doc:
-- "moe.name", "moe.group.name", "moe.Class:name", or "*:name" for a method that several classes share.
return {
}
