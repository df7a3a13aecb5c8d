//! The Machine room: the board. RAM, an accelerator, devices and a run state, put together as one virtual machine.
//!
//! `VirtualMachine` is the summary. `RunGate` holds and releases the vCPU threads, whose exit loop is `VirtualCPUThread`; `Board` answers
//! what leaves guest memory; `Boot/` says what is in memory at power-on; `+State` carries the state that migrates.

public import Accelerator
import Devices
public import GuestMemory
import GuestPrograms
import Host
import KVM
import Synchronization

/// A virtual machine: RAM, vCPUs and devices, and what they are doing.
///
/// Commands may come from any thread. Each is carried out whole before the next: run-state changes have one owner, the `control` lock.
public final class VirtualMachine: Sendable {
    public let configuration: MachineConfiguration
    public let memory: GuestMemory
    public let serial: SerialPort
    /// `nil` for a machine without vCPUs.
    public let accelerator: (any Accelerator)?
    let board: Board?
    /// What a reset puts into memory.
    private let bootPlan: BootPlan?
    let gate: RunGate
    private let threads = Mutex<[HostThread]>([])
    private let haste = Mutex<VirtualCPUHaste?>(nil)
    private let control: RunControl
    private let observers = Mutex<[@Sendable (MachineEvent) -> Void]>([])
    private let requests = Monitor<[Board.Request]>([])
    /// Why a vCPU cannot go on, from when it came out until the guest is reset.
    private let failure = Mutex<String?>(nil)
    /// A guest may ask in a loop until it is heard.
    private static let requestLimit = 16

    /// Makes a machine, its memory filled as the boot plan says; no vCPU runs yet.
    ///
    /// - Throws: `MachineError`: a size or count that is not possible, an accelerator or memory the host does not grant.
    public init(_ configuration: MachineConfiguration, serial: SerialPort) throws(MachineError) {
        try configuration.validate()
        self.configuration = configuration
        self.serial = serial
        memory = try Self.makeMemory(configuration)
        control = RunControl(configuration.isIncoming ? .inMigrate : .prelaunch)
        gate = RunGate()
        guard configuration.kind == .pc else {
            (accelerator, board, bootPlan) = (nil, nil, nil)
            return
        }
        let layout = try Self.layout(configuration)
        let kvm: KVMAccelerator
        do throws(AcceleratorError) {
            kvm = try KVMAccelerator(
                memory: memory, cpuCount: configuration.cpuCount, dirtyTracking: configuration.dirtyTracking)
        } catch { throw MachineError(error.description) }
        do throws(MemoryError) { try memory.addListener(kvm.memoryListener, showing: memory.view) } catch {
            throw MachineError(error.description)
        }
        accelerator = kvm
        do throws(GuestProgramError) {
            bootPlan = try configuration.boot?.plan(
                layout: layout, cpuCount: configuration.cpuCount, tscKilohertz: kvm.tscKilohertz)
        } catch { throw MachineError(error.description) }
        let requests = requests
        board = try Board(
            memory: memory, layout: layout,
            bootDiskImage: configuration.isIncoming ? [] : bootPlan?.bootDiskImage ?? [], serial: serial,
            interrupts: { [weak kvm] line, level in kvm?.setInterruptLine(line, level: level) },
            request: { request in requests.withLock { if $0.count < Self.requestLimit { $0.append(request) } } })
        if !configuration.isIncoming { try powerOn() }
        try startThreads()
    }

    static func layout(_ configuration: MachineConfiguration) throws(MachineError) -> RAMLayout {
        do throws(RAMLayoutError) {
            return try RAMLayout(byteCount: configuration.memoryByteCount, physicalAddressBits: 46)
        } catch { throw MachineError(error.description) }
    }

    /// One block named `ram`, as QEMU's machine `none` has it; a PC shows it below 3 GiB and from 4 GiB on.
    private static func makeMemory(_ configuration: MachineConfiguration) throws(MachineError) -> GuestMemory {
        let byteCount = configuration.memoryByteCount
        let ranges = configuration.kind == .pc ? try layout(configuration).ranges : [0..<byteCount]
        do {
            let block = try RAMBlock(name: "ram", byteCount: byteCount, backing: configuration.backing)
            if configuration.isPreallocated {
                try block.mapping.populate(isReserved: block.pageBytes > GuestPage.byteCount)
            }
            let memory = GuestMemory(blocks: [block])
            var transaction = MemoryTransaction()
            var offset: UInt64 = 0
            for range in ranges {
                let name = range.lowerBound == 0 ? "ram" : "ram-above-4g"
                let size = UInt64(range.count)
                transaction.add(
                    .ram(name, block, offset: RAMOffset(offset), byteCount: size), at: range.lowerBound)
                offset += size
            }
            try memory.commit(transaction)
            return memory
        } catch { throw MachineError("guest memory of \(byteCount) bytes: \(error)") }
    }

    // MARK: Observing

    /// What the last command has made of it. Never waits for a command that is being carried out.
    public var runState: RunState { control.current }

    /// Calls `observer` with every event from now on, on the thread where it happens.
    public func observe(_ observer: @escaping @Sendable (MachineEvent) -> Void) {
        observers.withLock { $0.append(observer) }
    }

    func report(_ event: MachineEvent) {
        for observer in observers.withLock({ $0 }) { observer(event) }
    }

    /// The kernel's thread ids of the vCPUs, by index.
    public var cpuThreadIDs: [Int32] { threads.withLock { $0.map(\.identifier) } }

    // MARK: Threads

    private func startThreads() throws(MachineError) {
        guard let accelerator, let board else { return }
        do throws(SystemError) {
            try HostThread.installInterruptSignal()
            for cpu in accelerator.cpus {
                let loop = VirtualCPUThread(
                    cpu: cpu, board: board, gate: gate, ending: { [weak self] in self?.vcpuEnds($0) },
                    ended: { [weak self] in self?.vcpuEnded($0) })
                let thread = try HostThread(name: "vcpu\(cpu.index)") { loop.run() }
                threads.withLock { $0.append(thread) }
            }
            _ = try HostThread(name: "machine") { [self] in serveRequests() }
        } catch { throw MachineError(error.description) }
    }

    /// What devices ask for is done here: a vCPU thread cannot wait for itself to stop.
    private func serveRequests() {
        while requests.wait(until: { $0.isEmpty ? nil : () }) != nil {
            // Taken under the lock: whoever holds it, such as a migration that stops the guest, sees what is not dealt with yet.
            let events = control.withLock { state in nextRequest().map { serve($0, &state, goesOn: true) } ?? [] }
            events.forEach(report)
        }
    }

    private func nextRequest() -> Board.Request? { requests.withLock { $0.isEmpty ? nil : $0.removeFirst() } }

    /// - Parameter goesOn: whether a running guest runs on after a reset. - Returns: what happened.
    private func serve(_ request: Board.Request, _ state: inout RunState, goesOn: Bool) -> [MachineEvent] {
        switch request {
        case .reset:
            do throws(MachineError) {
                try restart(&state, goesOn: goesOn)
                return [.reset(byGuest: true)]
            } catch {
                // A guest that cannot be reset has nothing to go on with.
                guard state == .running else { return [] }
                pauseCPUs()
                state = .internalError
                return [.internalError(error.description), .stopped]
            }
        case .shutdown(let status):
            // A guest that was paused just behind its last word has said it all the same.
            guard state == .running || state == .paused else { return [] }
            pauseCPUs()
            forgetRequests()
            state = .shutdown
            return [.shutdown(exitStatus: status)]
        }
    }

    /// What the guest asked for before a reset or its end, while it was not heard yet, is not asked of what comes after. Call while
    /// no vCPU runs.
    private func forgetRequests() {
        requests.withLock { $0.removeAll() }
        failure.withLock { $0 = nil }
    }

    /// A vCPU has something it cannot answer (a triple fault, an error), and still counts as running: a migration that stops the guest
    /// just now must not hand over what came to its end.
    private func vcpuEnds(_ reason: ExitReason) {
        switch reason {
        case .reset: requests.withLock { $0.append(.reset) }
        case .failed(let sentence): failure.withLock { $0 = sentence }
        default: break
        }
    }

    /// It has left the gate.
    private func vcpuEnded(_ reason: ExitReason) {
        switch reason {
        case .failed(let sentence):
            // From a vCPU's thread: it has left the gate, so stopping the others does not wait for it.
            control.withLock { state in
                guard state == .running else { return }
                pauseCPUs()
                state = .internalError
            }
            report(.internalError(sentence))
            report(.stopped)
        default: break
        }
    }

    func pauseCPUs() {
        gate.close { for cpu in accelerator?.cpus ?? [] { cpu.kick() } }
    }

    /// The guest never runs again: its memory is about to lose pages. Does not wait: a vCPU may sleep for one of them, inside the guest.
    /// Where it wakes up it leaves, and nobody hears what it says until then.
    public func retire() {
        board?.becomeDeaf()
        gate.retire { for cpu in accelerator?.cpus ?? [] { cpu.kick() } }
    }

    // MARK: Commands

    /// Lets the guest run (`cont`). - Throws: `MachineError` where that would be wrong, saying why.
    public func resume() throws(MachineError) {
        let changed = try control.withLock { (state) throws(MachineError) in
            switch state {
            case .running: return false
            case .prelaunch, .paused: break
            case .inMigrate:
                throw MachineError("cont: the machine waits for an incoming migration; it starts when that has arrived")
            case .finishMigrate:
                throw MachineError("cont: a migration is about to finish; cancel it first (migrate_cancel)")
            case .postMigrate:
                throw MachineError(
                    "cont: the guest was handed over to a migration destination and may run there; it must not run twice"
                )
            case .shutdown: throw MachineError("cont: the guest has shut down; reset it first (system_reset)")
            case .internalError:
                throw MachineError(
                    "cont: the guest cannot run on after an internal error; reset it first (system_reset)")
            }
            state = .running
            failure.withLock { $0 = nil }
            gate.open()
            return true
        }
        if changed { report(.resumed) }
    }

    /// Stops the guest (`stop`). A stopped guest stays stopped.
    public func pause() {
        let changed = control.withLock { state in
            guard state == .running else {
                if state == .prelaunch { state = .paused }
                return false
            }
            pauseCPUs()
            state = .paused
            return true
        }
        if changed { report(.stopped) }
    }

    /// Starts the machine afresh with what it was booted with (`system_reset`).
    public func reset(byGuest: Bool = false) throws(MachineError) {
        try control.withLock { (state) throws(MachineError) in try restart(&state, goesOn: true) }
        report(.reset(byGuest: byGuest))
    }

    private func restart(_ state: inout RunState, goesOn: Bool) throws(MachineError) {
        switch state {
        case .inMigrate, .finishMigrate, .postMigrate:
            throw MachineError("system_reset: not while the machine is \(state.rawValue)")
        case .running, .paused, .prelaunch, .shutdown, .internalError: break
        }
        guard bootPlan != nil || accelerator == nil else {
            throw MachineError(
                "reset: this machine was not told what to boot; start it with --boot-sector, --kernel or --guest")
        }
        let wasRunning = state == .running
        pauseCPUs()
        forgetRequests()
        do throws(MachineError) {
            try powerOn()
        } catch {
            state = .internalError
            report(.internalError(error.description))
            throw error
        }
        if state == .shutdown || state == .internalError { state = .paused }
        if wasRunning, goesOn { gate.open() }
    }

    /// Runs `body` while no vCPU runs; a running guest runs on afterwards. For looks at vCPU state.
    public func whileStopped<R, E: Error>(_ body: () throws(E) -> R) throws(E) -> R {
        try control.withLock { (state) throws(E) -> R in
            guard state == .running else { return try body() }
            pauseCPUs()
            defer { gate.open() }
            return try body()
        }
    }

    /// Runs `body` while no command is carried out. - Returns: `nil`, and `body` did not run, if something the guest asked for is not done yet.
    func whileUnchanged<R, E: Error>(_ body: (RunState) throws(E) -> R?) throws(E) -> R? {
        try control.withLock { (state) throws(E) -> R? in
            guard requests.withLock({ $0.isEmpty }), failure.withLock({ $0 }) == nil else { return nil }
            return try body(state)
        }
    }

    /// Carries out the boot plan. Call while no vCPU runs.
    private func powerOn() throws(MachineError) {
        guard let accelerator, let board, let boot = bootPlan else { return }
        board.reset()
        do {
            try accelerator.resetSystem()
            for segment in boot.segments {
                try memory.write(Array(segment.bytes), at: GuestPhysicalAddress(segment.address))
                let tail = segment.byteCount - UInt64(segment.bytes.count)
                try memory.zero(
                    at: GuestPhysicalAddress(segment.address) + UInt64(segment.bytes.count), byteCount: tail)
            }
            for cpu in accelerator.cpus { try cpu.reset(to: cpu.index == 0 ? Self.start(boot.cpu) : .waitForSIPI) }
        } catch {
            throw MachineError("\(error)")
        }
    }

    private static func start(_ cpu: InitialCPUState) -> StartState {
        switch cpu {
        case .real16(let cs, let ip, let sp, let dl): .real(cs: cs, ip: ip, sp: sp, dl: dl)
        case .protected32(let entry, let ebx): .protected32(entry: entry, ebx: ebx)
        }
    }

    // MARK: Run state for migration

    /// Stops the guest for the end of an outgoing migration. - Returns: whether it ran.
    ///
    /// - Throws: `MachineError` when the guest has come to its end, and there is nothing to migrate.
    public func stopForMigration() throws(MachineError) -> Bool {
        var events: [MachineEvent] = []
        defer { events.forEach(report) }
        return try control.withLock { (state) throws(MachineError) in
            let wasRunning = state == .running
            if wasRunning { pauseCPUs() }
            // What the guest asked for just before is done now: nobody at the destination would know of it.
            while let request = nextRequest() { events += serve(request, &state, goesOn: false) }
            // Its vCPU's thread says so to those who watch.
            if failure.withLock({ $0 }) != nil { state = .internalError }
            guard state != .shutdown, state != .internalError else {
                throw MachineError("the guest came to its end before it was handed over (\(state.rawValue))")
            }
            state = .finishMigrate
            if wasRunning { events.append(.stopped) }
            return wasRunning
        }
    }

    /// Undoes `stopForMigration` after a migration that failed or was cancelled.
    public func resumeAfterMigration(wasRunning: Bool) {
        let changed = control.withLock { state in
            guard state == .finishMigrate || state == .postMigrate else { return false }
            state = wasRunning ? .running : .paused
            if wasRunning { gate.open() }
            return true
        }
        if wasRunning, changed { report(.resumed) }
    }

    /// The right to run the guest goes to the destination: `cont` is refused from here on.
    public func handOver() { control.withLock { $0 = .postMigrate } }

    /// The guest has arrived: it runs, or stays paused as it was.
    ///
    /// If it runs, and by a moment, its vCPUs are in a hurry until `endHaste`.
    /// - Parameter deadline: a moment of the monotonic clock by which a vCPU must be about to enter the guest.
    /// - Returns: `false` if none was by then; nothing has happened.
    @discardableResult
    public func startAfterMigration(running: Bool, by deadline: UInt64? = nil) -> Bool {
        let starts = control.withLock { state -> Bool? in
            guard state == .inMigrate else { return nil }
            if running, let deadline, accelerator != nil {
                hasten()
                guard gate.open(until: deadline) else { return false }
            } else {
                guard Clock.monotonicNanoseconds <= deadline ?? .max else { return false }
                if running { gate.open() }
            }
            state = running ? .running : .paused
            return true
        }
        if starts == false { endHaste() }
        if running, starts == true { report(.resumed) }
        return starts ?? true
    }

    private func hasten() {
        let threads = threads.withLock { $0 }
        haste.withLock { $0 = VirtualCPUHaste(threads) }
    }

    /// The guest runs: its vCPUs are threads like others again. Harmless if they are already.
    public func endHaste() {
        haste.withLock { haste in
            haste?.end()
            haste = nil
        }
    }
}
