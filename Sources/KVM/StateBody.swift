import Accelerator

/// Big-endian integers in a list of bytes, as the migration stream has them.
struct ByteList {
    private(set) var bytes: [UInt8]
    private var position = 0

    init(_ bytes: [UInt8] = []) { self.bytes = bytes }

    mutating func append<T: FixedWidthInteger>(_ value: T) {
        for shift in stride(from: T.bitWidth - 8, through: 0, by: -8) {
            bytes.append(UInt8(truncatingIfNeeded: value >> T(shift)))
        }
    }

    mutating func append(contentsOf more: [UInt8]) { bytes += more }

    mutating func next<T: FixedWidthInteger>() -> T? {
        let size = T.bitWidth / 8
        guard bytes.count - position >= size else { return nil }
        var value: T = 0
        for byte in bytes[position..<position + size] { value = value << 8 | T(truncatingIfNeeded: byte) }
        position += size
        return value
    }

    mutating func next(_ count: Int) -> [UInt8]? {
        guard count >= 0, bytes.count - position >= count else { return nil }
        defer { position += count }
        return Array(bytes[position..<position + count])
    }

    var isAtEnd: Bool { position == bytes.count }
}

/// A section body made of parts, each `be16 part, be32 length, bytes`.
struct PartList {
    private var list = ByteList()
    var bytes: [UInt8] { list.bytes }

    mutating func append(_ part: UInt16, _ body: [UInt8]) {
        list.append(part)
        list.append(UInt32(body.count))
        list.append(contentsOf: body)
    }

    /// The parts by number. - Throws: unless each expected part is there once, and nothing else.
    static func parse(
        _ bytes: [UInt8], of section: String, expecting expected: [UInt16]
    ) throws(AcceleratorError)
        -> [UInt16: [UInt8]]
    {
        var list = ByteList(bytes)
        var parts: [UInt16: [UInt8]] = [:]
        while !list.isAtEnd {
            guard let number: UInt16 = list.next(), let count: UInt32 = list.next(), let body = list.next(Int(count))
            else {
                throw AcceleratorError("section \(section): the body of \(bytes.count) bytes ends inside a part")
            }
            guard expected.contains(number) else {
                throw AcceleratorError("section \(section): part \(number) is not known")
            }
            guard parts.updateValue(body, forKey: number) == nil else {
                throw AcceleratorError("section \(section): part \(number) comes twice")
            }
        }
        for number in expected where parts[number] == nil {
            throw AcceleratorError("section \(section): part \(number) is missing")
        }
        return parts
    }
}
