import Devices
import Machine
import Testing

@Suite("boot sector")
struct BootSectorTests {
    private func image(_ bytes: Int) -> [UInt8] { (0..<bytes).map { UInt8(truncatingIfNeeded: $0 &* 31 &+ 7) } }

    @Test("an image of any length is loaded whole at 0x7c00", arguments: [1, 511, 512, 513, 5120, 491_520])
    func loads(bytes: Int) throws {
        let plan = try BootSector(file: "guest.img", image: image(bytes)).plan
        let loaded = try #require(plan.segments.first { $0.address == 0x7c00 })
        #expect(loaded.bytes.elementsEqual(image(bytes)))
        #expect(loaded.byteCount == UInt64(bytes))
        #expect(plan.bootDiskImage == image(bytes))
    }

    @Test("it starts in real mode at 0000:7c00 with the drive in DL and a stack below")
    func start() throws {
        let plan = try BootSector(file: "guest.img", image: [0xf4]).plan
        #expect(plan.cpu == .real16(cs: 0, ip: 0x7c00, sp: 0x7000, dl: 0x80))
    }

    @Test("an empty image is refused by name")
    func empty() {
        let error = #expect(throws: BootError.self) { try BootSector(file: "guest.img", image: []) }
        #expect(error?.description == "boot sector guest.img: the file is empty")
    }

    @Test("one byte more than 480 KiB is refused with the size and the limit, before or after it is read")
    func tooLarge() {
        let error = #expect(throws: BootError.self) { try BootSector(file: "guest.img", image: image(491_521)) }
        #expect(
            error?.description
                == "boot sector guest.img: 491521 bytes are more than the limit of 491520 bytes (480 KiB)")
        #expect(throws: BootError.self) { try BootSector.checkLength(.max, file: "guest.img") }
    }

    @Test("the parts of a plan do not overlap and fit in the smallest guest below the BIOS's conventional memory")
    func disjoint() throws {
        let plan = try BootSector(file: "guest.img", image: image(491_520)).plan
        let smallest = try RAMLayout(byteCount: RAMLayout.minimumBytes, physicalAddressBits: 36)
        for segment in plan.segments { #expect(smallest.contains(address: segment.address, count: segment.byteCount)) }
        for (lower, upper) in zip(plan.segments, plan.segments.dropFirst()) {
            #expect(lower.address + lower.byteCount <= upper.address)
        }
        #expect(0x7c00 + 491_520 <= 639 << 10)
    }

    @Test("the BIOS is in place: vectors at 0, data area at 0x400, ROM at 0xf0000")
    func bios() throws {
        let plan = try BootSector(file: "guest.img", image: [0xf4]).plan
        func bytes(at address: UInt64) -> [UInt8]? {
            plan.segments.first { $0.address == address }.map { Array($0.bytes) }
        }
        #expect(bytes(at: 0) == BIOSImage.vectorTable)
        #expect(bytes(at: 0x400) == BIOSImage.dataArea(hardDisks: 1))
        #expect(bytes(at: 0xf0000) == BIOSImage.rom)
    }

    @Test("a boot sector that asks int 13h for the sectors behind it gets what is loaded there already")
    func selfLoading() throws {
        let plan = try BootSector(file: "guest.img", image: image(5000)).plan
        let disk = try BootDisk(image: plan.bootDiskImage)
        let rest = try #require(disk.sectors(from: 1, count: 9))
        #expect(rest.prefix(5000 - 512).elementsEqual(image(5000).dropFirst(512)))
        #expect(rest.dropFirst(5000 - 512).allSatisfy { $0 == 0 })
    }
}
