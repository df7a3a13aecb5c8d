/// One range of the guest's physical memory map, as INT 15h AX=E820h and the PVH start info report it.
public struct E820Entry: Equatable, Sendable {
    /// What a range is used for; the values are those of ACPI's address range types.
    public enum Kind: UInt32, Sendable {
        case ram = 1
        case reserved = 2
    }

    /// Guest physical address of the first byte.
    public let base: UInt64
    /// Length in bytes.
    public let length: UInt64
    /// What the range is used for.
    public let kind: Kind

    /// A range of `length` bytes from `base`.
    public init(base: UInt64, length: UInt64, kind: Kind) {
        self.base = base
        self.length = length
        self.kind = kind
    }
}
