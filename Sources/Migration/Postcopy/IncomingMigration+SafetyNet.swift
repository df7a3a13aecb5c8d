import Accelerator
import Host
import Machine
import MigrationStream
import Synchronization
import Transport

// A guest that its source can take back: the shell's part at the destination.

extension IncomingMigration {
    var recorder: EpochRecorder? { recorders.wait { .some($0) } ?? nil }

    /// The operator says that the guest stays here without its source (`x-postcopy-keep`).
    func keepGuest() throws(MigrationError) {
        post(.keepGuest)
        guard recorder?.figures.isOver == true else {
            throw MigrationError("x-postcopy-keep: the guest is just being started, or its source is back")
        }
    }

    func performEpochs(_ action: DestinationAction) -> DestinationEvent? {
        switch action {
        case .prepareEpochs: return prepareEpochs()
        case .armEpochs:
            do throws(SystemError) { try recorder?.arm() } catch {
                return .pagesFailed("x-postcopy-safety-net: \(error.description)")
            }
        case .goOnWithEpochs: recorder?.goOn()
        case .holdEpochs: recorder?.pause()
        case .sayStays: recorder?.sayStays()
        case .endEpochs:
            guard recorder?.end() == true else {
                // The guest never ran here in epochs. What comes for the next migration is not for this one.
                recorders.withLock { $0 = nil }
                break
            }
            report(.notice("nothing of the guest is given back to its source any more"))
        default: break
        }
        return nil
    }

    func prepareEpochs() -> DestinationEvent? {
        guard let postcopy else { return nil }
        do throws(AcceleratorError) {
            let recorder = try EpochRecorder(
                machine, postcopy.pending, epochMilliseconds: postcopyEpochMilliseconds
            ) { [weak self] id, reason in
                self?.post(id.map { .disconnected($0, reason) } ?? .pagesFailed(reason))
            }
            recorders.withLock { $0 = recorder }
            return nil
        } catch { return .pagesFailed("x-postcopy-safety-net: \(error.description)") }
    }

    /// What the source says on the safety net's channel.
    func readNet(_ channel: Channel, _ id: ConnectionID, behind first: ReceiveBuffer) {
        HostThread.renameCurrent("epoch-recv")
        guard let recorder = awaitRecorder(id) else { return }
        recorder.attach(id, channel)
        defer { recorder.detach(id) }
        var decoder = EpochDecoder(blocks)
        var buffer = first
        do {
            while true {
                while let message = try decoder.next(from: &buffer) {
                    switch message {
                    case .kept(let epoch):
                        if let fault = recorder.heard(kept: epoch, on: id) { return post(.rejected(id, fault)) }
                    case .released: post(.guestReleased(id))
                    default: return post(.rejected(id, "it says on its safety net what a destination would"))
                    }
                    guard isOpen(id) else { return }
                }
                let count = try unsafe buffer.fill(atLeast: 256) { (room) throws(ChannelError) in
                    try unsafe channel.receive(into: room)
                }
                guard count > 0 else { throw ChannelError.unusable("the source closed its safety net") }
            }
        } catch let error as StreamError {
            post(.rejected(id, error.description))
        } catch { post(.disconnected(id, "\(error)")) }
    }

    /// It is there as soon as the main connection has told what the memory is.
    private func awaitRecorder(_ id: ConnectionID) -> EpochRecorder? {
        while isOpen(id) {
            let found = recorders.wait(deadline: .after(nanoseconds: 50_000_000)) { $0 }
            if let found { return found }
        }
        return nil
    }
}
