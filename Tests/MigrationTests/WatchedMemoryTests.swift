import GuestMemory
import Host
import Machine
import Synchronization
import TestSupport
import Testing

@testable import Migration

@Suite("memory files that vCPUs see in windows", .serialized)
struct WatchedMemoryTests {
    @Test(
        "a page of a memory file that is shown anew while pages are missing stops who touches it there, until it is placed",
        .enabled(if: hasKVM, needsKVM), .timeLimit(.minutes(10)))
    func shownAnew() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 30) {
                let machine = try VirtualMachine(
                    MachineConfiguration(memoryByteCount: 16 << 20, backing: .memfd, isIncoming: true),
                    serial: SerialPort(.none))
                let (memory, block) = (machine.memory, machine.memory.blocks[0])
                let watched = try WatchedMemory(memory, wanting: [.missingShared])
                let pending = try PendingPages(memory)
                try watched.faults.register(block.mapping, 0..<Int(block.byteCount), .missing)
                try watched.watchWindows(of: machine.accelerator)
                claim(watched.shownNow.map(\.pages) == [block.pages], "\(watched.shownNow)")
                // Pages 100 to 108 a second time, elsewhere.
                var change = MemoryTransaction()
                let part = (first: RAMOffset(100 << 12), byteCount: UInt64(8 << 12))
                let id = change.add(
                    .ram("again", block, offset: part.first, byteCount: part.byteCount), at: 0xd000_0000)
                try memory.commit(change)
                let windows = watched.shownNow
                claim(windows.count == 2 && windows[1].pages == PageIndex(100)..<PageIndex(108), "\(windows)")
                let address = windows[1].address + 3 << 12 + 8
                claim(
                    watched.page(at: address)?.page == PageIndex(103),
                    "\(String(describing: watched.page(at: address)))")
                pending.expect(PageIndex(90)..<PageIndex(110), of: 0)
                let value = Atomic<UInt64>(0)
                let reader = try HostThread(name: "touch") {
                    // SAFETY: the window is mapped, and stays so until the thread has ended.
                    let word = unsafe UnsafePointer<UInt64>(bitPattern: address)!
                    value.store(unsafe word.pointee, ordering: .releasing)
                }
                var batch = PageFaultBatch()
                claim(try watched.faults.waitForFaults(into: &batch, stop: EventDescriptor()), "no fault came")
                claim(watched.page(at: batch[0].address)?.page == PageIndex(103), "\(batch[0])")
                let placer = try PagePlacer(PagePlacement(watched: watched, memory: memory, pending: pending))
                let room = try placer.room(for: PageIndex(103), of: 0)
                room.mapping.store(UInt64(77), at: room.offset + 8)
                try placer.came(PageIndex(103), of: 0)
                try placer.flush()
                reader.join()
                claim(value.load(ordering: .acquiring) == 77, "it read \(value.load(ordering: .acquiring))")
                // What goes is not known any more.
                var back = MemoryTransaction()
                back.remove(id)
                try memory.commit(back)
                claim(watched.page(at: address) == nil, "a window that is gone is known")
                claim(watched.shownNow.count == 1, "\(watched.shownNow)")
                watched.endWindows()
            }
        }
    }
}
