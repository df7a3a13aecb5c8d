import TestSupport

@testable import GuestPrograms

/// A guest in Swift, independent of the checker's formulas: makes one store at a time, as the processor does, so that a test can
/// stop it between any two.
final class GuestModel {
    /// RAM by offset, hole removed.
    private(set) var ram: [UInt64]
    let lowMemoryBytes: UInt64
    let block: ParameterBlock
    private var cpus: [CPU] = []

    private struct CPU {
        var fill: Range<UInt64>
        var word: UInt64 = 0
        var noise: UInt64 = 0
        var work: Range<UInt64>
        var progress: UInt64 = 0
        var pageIsWritten = false
        var passed = false
    }

    init(_ text: String, memoryBytes: UInt64, lowMemoryBytes: UInt64, cpus count: Int, active: Int? = nil) throws {
        let program = try GuestProgram(parsing: text)
        let image = try program.image(
            memoryBytes: memoryBytes, lowMemoryBytes: lowMemoryBytes, cpus: count, tscKilohertz: 2_000_000)
        ram = [UInt64](repeating: 0, count: Int(memoryBytes / 8))
        self.lowMemoryBytes = lowMemoryBytes
        let code = image.segments[0].bytes
        block = try ParameterBlock(words: (0..<ParameterBlock.wordCount).map { code.word(at: 0x200 + $0 * 8) })
        for segment in image.segments {
            for offset in stride(from: 0, to: segment.bytes.count, by: 8) {
                ram[(Int(segment.physicalAddress) + offset) / 8] = segment.bytes.word(at: offset)
            }
        }
        let active = UInt64(active ?? count)
        store(active, at: 0xF010)
        for index in 0..<active {
            let fill = block.fillPages * index / active..<block.fillPages * (index + 1) / active
            let work = block.positions * index / active..<block.positions * (index + 1) / active
            cpus.append(CPU(fill: fill.lowerBound + block.fillFirst..<fill.upperBound + block.fillFirst, work: work))
            store(2, at: status(index, 0x10))
        }
    }

    var activeCPUs: Int { cpus.count }

    func status(_ cpu: UInt64, _ offset: UInt64) -> UInt64 { 0x10000 + cpu * 4096 + offset }
    func load(_ offset: UInt64) -> UInt64 { ram[Int(offset / 8)] }
    func store(_ word: UInt64, at offset: UInt64) { ram[Int(offset / 8)] = word }

    func offset(ofPhysical address: UInt64) -> UInt64 {
        address < lowMemoryBytes ? address : address - (4 << 30) + lowMemoryBytes
    }

    /// The access the checker is given; addresses outside RAM are an error.
    var reader: GuestMemoryReader {
        { (address, buffer) throws(GuestProgramError) in
            let offset = Int(self.offset(ofPhysical: address) / 8)
            let inHole = address < 4 << 30 && address + UInt64(buffer.count) > self.lowMemoryBytes
            guard !inHole, offset + buffer.count / 8 <= self.ram.count else {
                throw .unreadable(physicalAddress: address, reason: "no RAM")
            }
            unsafe self.ram[offset..<offset + buffer.count / 8].withUnsafeBytes { unsafe buffer.copyMemory(from: $0) }
        }
    }

    /// Whether every vCPU has filled its share.
    var isFilled: Bool { cpus.allSatisfy(\.fill.isEmpty) }

    /// One store by one vCPU.
    func step(_ index: Int) {
        if !cpus[index].fill.isEmpty {
            stepFill(index)
        } else if isFilled, !cpus[index].work.isEmpty, block.writesPages {
            stepWalk(index)
        }
    }

    private func stepFill(_ index: Int) {
        let page = cpus[index].fill.lowerBound
        let word = cpus[index].word
        if word == block.words {
            cpus[index].fill = page + 1..<cpus[index].fill.upperBound
            cpus[index].word = 0
            let filled = status(UInt64(index), 0x18)
            store(load(filled) + 1, at: filled)
            return
        }
        if word == 0 {
            cpus[index].noise = (page &* 0x9E37_79B9_7F4A_7C15 &+ block.seed) | 1
            store((page * 0x9E37_79B1 & 0xFFFF_FFFF) << 32, at: page * 4096)
        } else {
            var noise = cpus[index].noise
            noise ^= noise << 13
            noise ^= noise >> 7
            noise ^= noise << 17
            cpus[index].noise = noise
            store(noise, at: page * 4096 + word * 8)
        }
        cpus[index].word += 1
    }

    private func stepWalk(_ index: Int) {
        let share = UInt64(cpus[index].work.count)
        var bits: UInt64 = 0
        while 1 << bits < share { bits += 1 }
        store(bits, at: status(UInt64(index), 0x78))
        store(3, at: status(UInt64(index), 0x10))
        var progress = cpus[index].progress
        let mask: UInt64 = (1 << bits) - 1
        let position = position(progress & mask, pass: progress >> bits, cpu: UInt64(index), bits: bits)
        if position < share && !cpus[index].pageIsWritten {
            let page = block.workFirst + (cpus[index].work.lowerBound + position) * block.stride
            let count = (progress >> bits + 1) & 0xFFFF_FFFF
            store((page * 0x9E37_79B1 & 0xFFFF_FFFF) << 32 | count, at: page * 4096)
            cpus[index].pageIsWritten = true
            return
        }
        if position >= share && !block.isRandom { progress |= mask }
        cpus[index].progress = progress + 1
        cpus[index].pageIsWritten = false
        store(progress + 1, at: status(UInt64(index), 0x20))
    }

    private func position(_ index: UInt64, pass: UInt64, cpu: UInt64, bits: UInt64) -> UInt64 {
        guard block.isRandom else { return index }
        let size: UInt64 = 1 << bits
        let half = bits <= 1 ? 1 : (bits + 1) / 2
        let key = (pass &+ cpu &* (1 << 20) &+ block.seed) &* 0x9E37_79B9_7F4A_7C15
        var word = ((index ^ key) &* 0xD134_2543_DE82_EF95) % size
        word ^= word >> half
        word = ((word &+ (key >> 29)) &* 0xAF25_1AF3_B0F0_25B5) % size
        return word ^ (word >> half)
    }

    /// Run until everything is filled.
    func fillAll() {
        while !isFilled {
            for index in cpus.indices { step(index) }
        }
    }

    /// Make stores of vCPUs chosen at random.
    func run(stores: Int, random: inout SeededRandom) {
        for _ in 0..<stores { step(Int.random(in: cpus.indices, using: &random)) }
    }
}
