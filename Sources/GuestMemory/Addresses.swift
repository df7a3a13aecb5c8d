/// The kinds of address of a virtual machine. They do not mix: converting is a decision, written down where it happens.

/// The size of a guest page in bytes, and its logarithm: what dirty tracking and the migration stream count in.
public enum GuestPage {
    public static let byteCount: UInt64 = 4096
    public static let shift: UInt64 = 12
}

/// An address as the guest's hardware sees it, in bytes.
public struct GuestPhysicalAddress: Hashable, Comparable, Sendable, CustomStringConvertible {
    public let value: UInt64
    public init(_ value: UInt64) { self.value = value }
    public static func < (a: Self, b: Self) -> Bool { a.value < b.value }
    public static func + (a: Self, byteCount: UInt64) -> Self { Self(a.value + byteCount) }
    public var description: String { "0x" + String(value, radix: 16) }
}

/// An offset into one RAM block, in bytes.
public struct RAMOffset: Hashable, Comparable, Sendable, CustomStringConvertible {
    public let value: UInt64
    public init(_ value: UInt64) { self.value = value }
    public static func < (a: Self, b: Self) -> Bool { a.value < b.value }
    public var page: PageIndex { PageIndex(value >> GuestPage.shift) }
    public var description: String { "0x" + String(value, radix: 16) }
}

/// The number of a page in one RAM block. 64 bits: blocks above 8 TiB are legal.
public struct PageIndex: Hashable, Comparable, Sendable, Strideable, CustomStringConvertible {
    public let value: UInt64
    public init(_ value: UInt64) { self.value = value }
    public static func < (a: Self, b: Self) -> Bool { a.value < b.value }
    public func distance(to other: Self) -> Int { Int(Int64(bitPattern: other.value &- value)) }
    public func advanced(by n: Int) -> Self { Self(value &+ UInt64(bitPattern: Int64(n))) }
    public var offset: RAMOffset { RAMOffset(value << GuestPage.shift) }
    public var description: String { "page \(value)" }
}
