import Devices
import Machine
import Testing

@Suite("RAM layout")
struct BootRAMLayoutTests {
    private static let gibibyte: UInt64 = 1 << 30

    @Test(
        "the first 3 GiB lie at 0 and the rest at 4 GiB",
        arguments: [
            (1 << 20, 1 << 20, 0), (3 << 30, 3 << 30, 0), ((3 << 30) + 4096, 3 << 30, 4096),
            (512 << 30, 3 << 30, 509 << 30),
        ] as [(UInt64, UInt64, UInt64)])
    func split(bytes: UInt64, low: UInt64, high: UInt64) throws {
        let ram = try RAMLayout(byteCount: bytes, physicalAddressBits: 46)
        #expect(ram.lowBytes == low)
        #expect(ram.highBytes == high)
        #expect(ram.ranges.first == 0..<low)
        #expect(ram.ranges.dropFirst().first == (high == 0 ? nil : 4 << 30..<(4 << 30) + high))
    }

    @Test(
        "a size that is no multiple of the page size or below 1 MiB is refused with a sentence",
        arguments: [
            ((1 << 20) + 1, "memory size 1048577: not a multiple of the page size of 4096 bytes"),
            (.max, "memory size 18446744073709551615: not a multiple of the page size of 4096 bytes"),
            (0, "memory size 0: less than the minimum of 1048576 bytes (1M)"),
            ((1 << 20) - 4096, "memory size 1044480: less than the minimum of 1048576 bytes (1M)"),
        ] as [(UInt64, String)])
    func refusal(bytes: UInt64, sentence: String) {
        let error = #expect(throws: RAMLayoutError.self) { try RAMLayout(byteCount: bytes, physicalAddressBits: 46) }
        #expect(error?.description == sentence)
    }

    @Test("the processor's physical addresses limit the size, the gap below 4 GiB counted", arguments: 33...52)
    func physicalAddresses(bits: Int) throws {
        let limit = (UInt64(1) << UInt64(bits)) - Self.gibibyte
        let ram = try RAMLayout(byteCount: limit, physicalAddressBits: bits)
        #expect(ram.ranges.last?.upperBound == 1 << UInt64(bits))
        #expect(throws: RAMLayoutError.tooLarge(bytes: limit + 4096, limit: limit, physicalAddressBits: bits)) {
            try RAMLayout(byteCount: limit + 4096, physicalAddressBits: bits)
        }
    }

    @Test("32 address bits allow 3 GiB, and impossible bit counts do not trap", arguments: [Int.min, -1, 0, 32])
    func fewBits(bits: Int) throws {
        #expect(try RAMLayout(byteCount: 3 << 30, physicalAddressBits: bits).lowBytes == 3 << 30)
        #expect(throws: RAMLayoutError.self) { try RAMLayout(byteCount: (3 << 30) + 4096, physicalAddressBits: bits) }
        #expect(throws: RAMLayoutError.self) { try RAMLayout(byteCount: 0 &- 4096, physicalAddressBits: .max) }
    }

    @Test("a range is RAM when all of it is, in one piece")
    func contains() throws {
        let ram = try RAMLayout(byteCount: 4 << 30, physicalAddressBits: 40)
        let inside: [(UInt64, UInt64)] = [(0, 3 << 30), (4 << 30, 1 << 30), (3 << 30, 0), ((5 << 30) - 1, 1)]
        let outside: [(UInt64, UInt64)] = [
            (0, (3 << 30) + 1), (3 << 30, 1), ((4 << 30) - 1, 2), (5 << 30, 1), (.max, 1), (1, .max), (.max, .max),
        ]
        for (address, count) in inside { #expect(ram.contains(address: address, count: count)) }
        for (address, count) in outside { #expect(!ram.contains(address: address, count: count)) }
    }

    @Test("the memory map ascends, covers all RAM above 1 MiB, and keeps the BIOS's places from the guest")
    func e820() throws {
        let large = try RAMLayout(byteCount: 8 << 30, physicalAddressBits: 40)
        #expect(
            large.e820 == [
                E820Entry(base: 0, length: 0x9fc00, kind: .ram),
                E820Entry(base: 0x9fc00, length: 0x400, kind: .reserved),
                E820Entry(base: 0xf0000, length: 0x10000, kind: .reserved),
                E820Entry(base: 0x100000, length: (3 << 30) - 0x100000, kind: .ram),
                E820Entry(base: 4 << 30, length: 5 << 30, kind: .ram),
            ])
        let small = try RAMLayout(byteCount: 1 << 20, physicalAddressBits: 40)
        #expect(small.e820.count == 3)
        #expect(small.e820.last?.kind == .reserved)
    }
}
